// Pointer read-out: the nearest point of every curve. The page is complete without it.
for (const svg of document.querySelectorAll("svg.chart")) {
  const plot = JSON.parse(svg.dataset.plot);
  const readout = svg.parentElement.querySelector(".readout");
  const cursor = svg.querySelector(".cursor");
  const spots = svg.querySelector(".spots");
  const place = (x) => plot.left + ((plot.right - plot.left) * x) / plot.max;
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) * svg.viewBox.baseVal.width) / box.width;
    const x = ((at - plot.left) * plot.max) / (plot.right - plot.left);
    const near = plot.series.map((s) => s.points.reduce((a, p) => (!a || Math.abs(p[0] - x) < Math.abs(a[0] - x) ? p : a), null));
    const first = near.find((p) => p);
    if (!first) return;
    cursor.setAttribute("x1", place(first[0]));
    cursor.setAttribute("x2", place(first[0]));
    cursor.style.visibility = "visible";
    spots.replaceChildren(...near.flatMap((p, i) => {
      if (!p) return [];
      const dot = document.createElementNS("http://www.w3.org/2000/svg", "circle");
      dot.setAttribute("cx", place(p[0]));
      dot.setAttribute("cy", p[1]);
      dot.setAttribute("r", 4);
      dot.setAttribute("class", "dots " + plot.series[i].colour);
      return [dot];
    }));
    readout.textContent = near.flatMap((p, i) => (p ? [`${plot.series[i].name} ${p[2]} (${plot.unit} ${p[0]})`] : [])).join(" · ");
  });
  svg.addEventListener("pointerleave", () => {
    cursor.style.visibility = "hidden";
    spots.replaceChildren();
    readout.textContent = "";
  });
}

# The coordinator, its log commands and `peerturb status`; no torch. From the repository's root:
#   docker build -f deploy/docker/coordinator.Dockerfile -t peerturb-coordinator .
FROM python:3.13-slim AS build
WORKDIR /source
COPY . .
RUN python -m venv /opt/peerturb \
 && /opt/peerturb/bin/pip install --no-cache-dir --constraint constraints.txt .

FROM python:3.13-slim
COPY --from=build /opt/peerturb /opt/peerturb
RUN useradd --system --uid 10001 --create-home --home-dir /data peerturb
ENV PATH=/opt/peerturb/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
WORKDIR /data
VOLUME /data
EXPOSE 7470 7471
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=10s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:7471/readyz', timeout=4)"]
ENTRYPOINT ["peerturb"]
CMD ["coordinator", "serve", "/config/RUN.toml", "--listen", "0.0.0.0:7470", "--http", "0.0.0.0:7471", \
     "--data-dir", "/data/run", "--tls-dir", "/keys", "--token", "/keys/join-token", "--json"]

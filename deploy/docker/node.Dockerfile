# A node, for a CPU or for CUDA; the kind of torch says which. From the repository's root:
#   docker build -f deploy/docker/node.Dockerfile -t peerturb-node:cpu .
#   docker build -f deploy/docker/node.Dockerfile -t peerturb-node:cuda \
#       --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
# A CUDA image needs the NVIDIA container toolkit on the host: docker run --gpus all ...
FROM python:3.13-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /source
COPY constraints.txt .
# torch first, in a layer of its own: it is most of the image and seldom changes.
RUN python -m venv /opt/peerturb \
 && /opt/peerturb/bin/pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"
COPY . .
RUN /opt/peerturb/bin/pip install --no-cache-dir --constraint constraints.txt ".[node,fast,adapters]"

FROM python:3.13-slim
# Triton compiles the launchers of its kernels with a C compiler; without a GPU nothing uses it.
# tini: the kernel withholds SIGTERM from a container's first process until it asks for it, and a node asks once its
# model is loaded.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev tini \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/peerturb /opt/peerturb
RUN useradd --system --uid 10001 --create-home --home-dir /data peerturb
ENV PATH=/opt/peerturb/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/data/huggingface NUMBA_CACHE_DIR=/data/numba
USER 10001
WORKDIR /data
VOLUME /data
EXPOSE 7472
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:7472/healthz', timeout=4)"]
ENTRYPOINT ["tini", "--", "peerturb", "node", "run", "--state", "/data/state", "--http", "0.0.0.0:7472", "--json"]
CMD ["--help"]

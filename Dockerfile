# CPU:   docker build --target cpu -t crosspool:cpu .     docker run --rm --shm-size=2g crosspool:cpu ./run_all.sh smoke
# CUDA:  docker build --target cuda -t crosspool:cuda .   docker run --rm --gpus all --shm-size=8g crosspool:cuda ./run_tests.sh -m gpu
# Mount a volume at /crosspool/results/local to keep records and figures.

FROM python:3.11-slim-bookworm AS base
RUN apt-get update \
    && apt-get install -y --no-install-recommends git build-essential \
    && rm -rf /var/lib/apt/lists/*
ENV CROSSPOOL_VENV=/venv PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
WORKDIR /crosspool
# Only what set-up reads, so that changes of the code do not install everything again.
COPY pyproject.toml constraints.txt ./
COPY scripts scripts

FROM base AS cpu
RUN bash -c '. scripts/setup_env.sh'
COPY . .
CMD ["./run_all.sh", "smoke"]

# The wheels of torch bring the CUDA libraries; the driver comes from the host through the container runtime.
FROM base AS cuda
RUN bash -c '. scripts/setup_env.sh && python -m pip install "cuda-bindings>=12.8,<14" -c constraints.txt'
COPY . .
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
CMD ["./run_tests.sh", "-m", "gpu"]

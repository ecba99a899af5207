# docker build -t spt-ds .                             a CPU
# docker build -t spt-ds --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 .    NVIDIA GPUs
# docs/how-to/container.md says how to run it.
ARG BASE=python:3.12.12-slim-bookworm
FROM ${BASE}

# The compiler is for the operations that DeepSpeed builds at their first use, and so is nvcc, which
# the devel images of CUDA have. They have no Python.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libaio-dev \
    && if ! command -v python3 > /dev/null; then \
        apt-get install --yes --no-install-recommends python3 python3-dev python3-venv; fi \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 10001 spt && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH TOKENIZERS_PARALLELISM=false

# PyTorch alone first: a change of the code must not install it again. An index of CPU wheels saves
# gigabytes of CUDA in an image for a CPU.
ARG TORCH_INDEX=
WORKDIR /opt/spt_ds
COPY constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt \
    ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch

ARG EXTRAS=evaluate,report,retrieve,baselines,tensorboard
COPY setup.py pyproject.toml MANIFEST.in README.md LICENSE ./
COPY spt_ds spt_ds
COPY ds_configs ds_configs
COPY slurm slurm
RUN pip install --no-cache-dir --constraint constraints.txt ".[$EXTRAS]"

# Runs, caches and built operations are written below the home, where a volume can be mounted.
USER spt
WORKDIR /home/spt
ENTRYPOINT ["spt-ds"]
CMD ["--help"]

# gptoss-export for TensorRT: docker build -f docker/tensorrt.Dockerfile -t gptoss-export:tensorrt .

FROM python:3.12.11-bookworm AS builder

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY exporter exporter
COPY engines engines
COPY validators validators
RUN pip install --no-cache-dir "scikit-build-core==1.1.2" "cmake==4.4.4" "ninja==1.13.2" \
    && pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .


# TensorRT 11.1.0.106, CUDA 13.3, Ubuntu 24.04, Python 3.12; the host needs a driver that runs CUDA 13.
# https://docs.nvidia.com/deeplearning/tensorrt/container-release-notes/
FROM nvcr.io/nvidia/tensorrt:26.07-py3

# Into a folder of its own, found before the image's packages: `tensorrt` is the image's, all else is as pinned.
# PIP_CONSTRAINT: the image's constraints are for the image's packages. PyTorch is only needed on the CPU.
ENV PIP_CONSTRAINT= \
    PYTHONPATH=/opt/gptoss-export \
    PYTHONUNBUFFERED=1 \
    PATH=/opt/gptoss-export/bin:$PATH
RUN --mount=type=bind,from=builder,source=/wheels,target=/wheels \
    python3 -m pip install --no-cache-dir --target /opt/gptoss-export \
        --index-url https://download.pytorch.org/whl/cpu --extra-index-url https://pypi.org/simple \
        "torch==2.13.0+cpu" "triton==3.9.0" "cuda-bindings==13.5.0" /wheels/*.whl \
    && python3 -c "from importlib.metadata import version; print(version('tensorrt'), version('gptoss-export'))"

# Open to everybody, so that --user with the numbers of the host's user works.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /cache exporter \
    && install --directory --mode=1777 /cache /data
ENV HOME=/cache
USER 10001:10001
WORKDIR /data
ENTRYPOINT ["gptoss-export"]
CMD ["--help"]

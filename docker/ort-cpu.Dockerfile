# gptoss-export for ONNX Runtime on CPU: docker build -f docker/ort-cpu.Dockerfile -t gptoss-export:ort-cpu .

# Both stages are Debian 12 and Python 3.12.11, so a virtual environment moves from one to the other as it is.
FROM python:3.12.11-bookworm AS builder

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY exporter exporter
COPY engines engines
COPY validators validators
RUN pip install --no-cache-dir "scikit-build-core==1.1.2" "cmake==4.4.4" "ninja==1.13.2" \
    && pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

# PyTorch for CPU first: what PyPI has brings gigabytes of CUDA that nothing here uses.
RUN python -m venv /opt/gptoss-export \
    && /opt/gptoss-export/bin/pip install --no-cache-dir \
        --index-url https://download.pytorch.org/whl/cpu "torch==2.13.0" \
    && /opt/gptoss-export/bin/pip install --no-cache-dir /wheels/*.whl

# A package without its kernel library installs all the same; an image without it is not worth having.
RUN /opt/gptoss-export/bin/python -c \
    "from gptoss_export.engines.ort.library import require_kernels; print(require_kernels())"


FROM python:3.12.11-slim-bookworm

COPY --from=builder /opt/gptoss-export /opt/gptoss-export
# Open to everybody, so that --user with the numbers of the host's user works.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /cache exporter \
    && install --directory --mode=1777 /cache /data
ENV PATH=/opt/gptoss-export/bin:$PATH \
    HOME=/cache \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /data
ENTRYPOINT ["gptoss-export"]
CMD ["--help"]

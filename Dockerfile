# Targets: `backend` is our service (web process and worker are one image), `label-studio` is Label Studio.
#
#   docker build --target backend --tag tsp-active-learning:cpu .
#   docker build --target backend --tag tsp-active-learning:cuda --build-arg TORCH_INDEX= .
#
# Web process: no command. Worker: the command `python -m ml_backend.worker`.

ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# What all have in common: a virtual environment, a user without rights, and a folder for what is to be kept.
FROM ${PYTHON_IMAGE} AS base
RUN python -m venv /opt/venv \
    && groupadd --gid 10001 tsp \
    && useradd --uid 10001 --gid tsp --no-create-home --home-dir /tmp --shell /usr/sbin/nologin tsp \
    && install --directory --owner=tsp --group=tsp --mode=0700 /data
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /data

# The project as a wheel. What it needs is written down apart, so that a change of code installs no library anew.
FROM base AS wheel
WORKDIR /source
COPY pyproject.toml README.md constraints.txt ./
COPY model ./model
COPY ml_backend ./ml_backend
RUN pip wheel --no-deps --wheel-dir /wheel . \
    && mkdir /requirements \
    && cp constraints.txt /requirements \
    && python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > /requirements/requirements.txt

# Settings of the service that follow from the folders above. TORCH_HOME is where torchvision keeps what it downloads.
FROM base AS service
ENV MODEL_DIR=/data \
    TORCH_HOME=/data/torch \
    TSP_HOST=0.0.0.0 \
    PORT=9090
EXPOSE 9090
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-m", "ml_backend.health", "http://127.0.0.1:9090/health"]
CMD ["python", "-m", "ml_backend.app"]

# The index is that of CPU-only wheels. PyPI's torch for x86-64, with an empty TORCH_INDEX, is built for CUDA 13 and brings
# its libraries; the host needs NVIDIA's driver and container toolkit.
FROM service AS backend
ARG TORCH="torch==2.14.1 torchvision==0.29.1"
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} $TORCH
COPY --from=wheel /requirements /requirements
RUN pip install --constraint /requirements/constraints.txt --requirement /requirements/requirements.txt \
    && pip install --no-deps label-studio-ml==1.0.9
COPY --from=wheel /wheel /wheel
RUN pip install --no-deps /wheel/*.whl
USER 10001:10001

# The release that this project was tried with, as its makers publish it on PyPI (docs/decisions/058).
FROM base AS label-studio
ARG LABEL_STUDIO=label-studio==1.23.2
RUN pip install $LABEL_STUDIO
ENV LABEL_STUDIO_BASE_DATA_DIR=/data
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=6 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health', timeout=4)"]
CMD ["label-studio", "start", "--no-browser", "--internal-host", "0.0.0.0", "--port", "8080"]
USER 10001:10001

# Image with this repository and the packages in requirements.lock, for work pools of type docker and kubernetes and for
# Dask workers: docker build -t modelpress .
FROM python:3.11-slim

# runs need git; the installation needs make
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/*

# a volume on /workspace must belong to this user: a new volume does; run chown 1000:1000 on an existing one
RUN useradd --create-home --uid 1000 press
WORKDIR /opt/modelpress
RUN mkdir /workspace && chown press:press /opt/modelpress /workspace
USER press

# packages first, so that a code change does not reinstall 3 GB
COPY --chown=press:press Makefile requirements.lock ./
RUN make packages && rm -rf /home/press/.cache
COPY --chown=press:press . .
# the build cannot read the version from git: docker build --build-arg VERSION=1.2.3; the default is 0.0.0
ARG VERSION
ARG SETUPTOOLS_SCM_PRETEND_VERSION_FOR_MODELPRESS=$VERSION
RUN make install && rm -rf /home/press/.cache

ENV PATH=/opt/modelpress/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    DO_NOT_TRACK=1 \
    MLFLOW_DISABLE_TELEMETRY=true

# mount the volume with the checkout here; Prefect's job templates start in this folder
WORKDIR /workspace

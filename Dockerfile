# The environment of requirements.lock and this repository, for work pools of type docker and kubernetes and for the
# workers of a Dask cluster: docker build -t modelpress .
FROM python:3.11-slim

# git and DVC keep what a run leaves; make installs
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/*

# a volume on /workspace belongs to this user: a new one takes that over, another needs chown 1000:1000
RUN useradd --create-home --uid 1000 press
WORKDIR /opt/modelpress
RUN mkdir /workspace && chown press:press /opt/modelpress /workspace
USER press

# what changes seldom comes first, so that a change of the code does not install 3 GB anew
COPY --chown=press:press Makefile requirements.lock ./
RUN make packages && rm -rf /home/press/.cache
COPY --chown=press:press . .
# a build has no git to take the version from: docker build --build-arg VERSION=1.2.3; without it, 0.0.0
ARG VERSION
ARG SETUPTOOLS_SCM_PRETEND_VERSION_FOR_MODELPRESS=$VERSION
RUN make install && rm -rf /home/press/.cache

ENV PATH=/opt/modelpress/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    DO_NOT_TRACK=1 \
    MLFLOW_DISABLE_TELEMETRY=true

# the checkout that runs work on is a volume, mounted here; Prefect's job templates start in it
WORKDIR /workspace

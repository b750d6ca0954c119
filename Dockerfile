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
COPY --chown=press:press Makefile pyproject.toml requirements.lock README.md ./
COPY --chown=press:press flows flows
COPY --chown=press:press tasks tasks
COPY --chown=press:press evals evals
RUN make install && rm -rf /home/press/.cache
COPY --chown=press:press . .

ENV PATH=/opt/modelpress/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    DO_NOT_TRACK=1 \
    MLFLOW_DISABLE_TELEMETRY=true

# the checkout that runs work on is a volume, mounted here; Prefect's job templates start in it
WORKDIR /workspace

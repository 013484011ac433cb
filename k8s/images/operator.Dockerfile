# Operator image: docker build -f k8s/images/operator.Dockerfile -t terrace-operator .
# No torch, no ray: the operator imports neither. About 150 MB.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm
FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
WORKDIR /src
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY platform platform
COPY operators operators
COPY k8s/images/bill_of_materials.py ./
COPY jobs/recipes jobs/recipes
# --no-deps: the package's own dependencies are for training; the operator needs these seven.
RUN /opt/venv/bin/pip install -c constraints.txt kopf kubernetes prometheus_client pydantic pyyaml psutil numpy \
 && /opt/venv/bin/pip install --no-deps . \
 && /opt/venv/bin/python bill_of_materials.py terrace-operator "$(/opt/venv/bin/pip show terrace | sed -n 's/^Version: //p')" > /opt/venv/bom.json

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
USER 10001:10001
ENTRYPOINT ["python", "-m", "terrace_operator"]

# Training image. CPU: docker build -f k8s/images/training.Dockerfile -t terrace:cpu .
# CUDA:  docker build -f k8s/images/training.Dockerfile --build-arg VARIANT=cuda -t terrace:cuda .
# The CUDA libraries come with torch's own wheels, so the base is the same plain Python for both variants; pin its digest in
# your registry (PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:...). Runs as uid 1000 with a read-only root file system:
# everything it writes goes to /tmp and to mounted volumes.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm
FROM ${PYTHON_IMAGE} AS build
ARG VARIANT=cpu
ARG CUDA_TAG=cu130
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
WORKDIR /src
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY platform platform
COPY operators operators
COPY k8s/images/bill_of_materials.py ./
COPY jobs/recipes jobs/recipes
# constraints.txt pins the CPU build of torch (torch==X+cpu); for CUDA the same version is taken from the CUDA index.
RUN if [ "$VARIANT" = cuda ]; then INDEX="https://download.pytorch.org/whl/${CUDA_TAG}"; else INDEX=https://download.pytorch.org/whl/cpu; fi \
 && sed -E 's/^(torch==[0-9.]+)\+cpu/\1/' constraints.txt > /tmp/constraints.txt \
 && /opt/venv/bin/pip install --extra-index-url "$INDEX" -c /tmp/constraints.txt ".[deepspeed,kubernetes]" \
 && if [ "$VARIANT" = cuda ]; then /opt/venv/bin/pip install -c /tmp/constraints.txt liger-kernel; fi \
 && /opt/venv/bin/python bill_of_materials.py "terrace-$VARIANT" "$(/opt/venv/bin/pip show terrace | sed -n 's/^Version: //p')" > /opt/venv/bom.json

FROM ${PYTHON_IMAGE}
# DeepSpeed compiles one small operation at its first start; wget and procps are what KubeRay's probes and Ray's agent call.
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ ninja-build wget procps \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 1000 terrace && useradd --uid 1000 --gid 1000 --no-create-home --home-dir /tmp terrace
COPY --from=build /opt/venv /opt/venv
WORKDIR /opt/terrace
COPY jobs jobs
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp TORCH_EXTENSIONS_DIR=/tmp/torch_extensions
USER 1000:1000
CMD ["terrace", "--help"]

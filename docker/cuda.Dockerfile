# fewstep on NVIDIA GPUs. torch brings its own CUDA; the host needs the driver and NVIDIA's container toolkit.
#
#   docker build -f docker/cuda.Dockerfile -t fewstep:cuda .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" -v fewstep-models:/models fewstep:cuda distill my.yaml
#
# Models of the Hugging Face Hub are kept in the volume fewstep-models.
FROM python:3.11-slim-bookworm AS source
WORKDIR /source
COPY . .
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheel . \
    && python -c "import tomllib; known = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*known['dependencies'], *known['optional-dependencies']['lowmem'], sep='\n')" \
        > /wheel/requirements.txt \
    && cp constraints.txt /wheel/

FROM python:3.11-slim-bookworm
COPY --from=source /wheel/requirements.txt /wheel/constraints.txt /wheel/
# This layer is kept as long as the dependencies stay the same.
RUN python -m pip install --no-cache-dir -c /wheel/constraints.txt -r /wheel/requirements.txt
COPY --from=source /wheel/*.whl /wheel/
RUN python -m pip install --no-cache-dir --no-deps /wheel/*.whl \
    && useradd --create-home --uid 1000 fewstep \
    && install --directory --owner fewstep /work /models
ENV HF_HOME=/models \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
WORKDIR /work
ENTRYPOINT ["fewstep"]
CMD ["--help"]

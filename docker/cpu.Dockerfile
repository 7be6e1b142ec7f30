# fewstep on a machine without a GPU: enough for the shipped model, for exports and for small experiments.
#
#   docker build -f docker/cpu.Dockerfile -t fewstep .
#   docker run --rm -v "$PWD:/work" fewstep sample scenes-64 -p "a red star"
#
# On x86 the usual torch brings gigabytes of CUDA that are of no use here. Name the index of torch's CPU builds, which
# its installation page shows, to leave them out: --build-arg PIP_EXTRA_INDEX_URL=ADDRESS
FROM python:3.11-slim-bookworm AS source
WORKDIR /source
COPY . .
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheel . \
    && python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > /wheel/requirements.txt \
    && cp constraints.txt /wheel/

FROM python:3.11-slim-bookworm
ARG PIP_EXTRA_INDEX_URL
COPY --from=source /wheel/requirements.txt /wheel/constraints.txt /wheel/
# This layer is kept as long as the dependencies stay the same.
RUN python -m pip install --no-cache-dir -c /wheel/constraints.txt -r /wheel/requirements.txt
COPY --from=source /wheel/*.whl /wheel/
RUN python -m pip install --no-cache-dir --no-deps /wheel/*.whl \
    && useradd --create-home --uid 1000 fewstep \
    && install --directory --owner fewstep /work
USER 1000
WORKDIR /work
ENTRYPOINT ["fewstep"]
CMD ["--help"]

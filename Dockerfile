# robustok on a CPU (about 3 GB):   docker build -t robustok .
# With CUDA (about 9 GB):           docker build -t robustok --build-arg TORCH=https://download.pytorch.org/whl/cu130 .
#
#   docker run --rm -v "$PWD/runs:/work/runs" robustok demo
#   docker run --rm --gpus all --ipc host -v "$PWD:/work" robustok main-train cifar10/tokenizer.yaml out=runs/tokenizer
FROM python:3.12-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY configs configs
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
ARG TORCH=https://download.pytorch.org/whl/cpu
ARG EXTRAS=all
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir torch torchvision --index-url "$TORCH" \
    && pip install --no-cache-dir "$(echo /wheels/*.whl)[$EXTRAS]" \
    && useradd --create-home --uid 1000 user && mkdir /work && chown user /work
USER user
WORKDIR /work
ENTRYPOINT ["robustok"]
CMD ["--help"]

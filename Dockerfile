# An image with the package, of the versions in constraints.txt, and without root:
#   docker build -t resnet_jax .                                                  CPU
#   docker build -t resnet_jax:gpu --build-arg EXTRAS=train,report,gcs,gpu .      NVIDIA GPUs
#   docker build -t resnet_jax:tpu --build-arg EXTRAS=train,report,gcs,tpu .      Cloud TPUs
# and a run in it; GPUs need --gpus=all --ipc=host, TPUs --privileged --net=host:
#   docker run --rm -v "$PWD/runs:/app/runs" -v "$HOME/tensorflow_datasets:/data" \
#     --user "$(id -u)" resnet_jax train --config=digits
FROM python:3.11-slim AS build
ARG EXTRAS=train,report
WORKDIR /src
COPY . .
RUN python -m venv /opt/venv
RUN /opt/venv/bin/pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]"

FROM python:3.11-slim
COPY --from=build /opt/venv /opt/venv
COPY train.py /app/
COPY configs /app/configs
RUN useradd resnet && mkdir -p /data /app/runs && chmod 1777 /data /app /app/runs
# Any user may run it, also one who has no home here.
ENV PATH="/opt/venv/bin:$PATH" TFDS_DATA_DIR=/data HOME=/tmp PYTHONUNBUFFERED=1
USER resnet
WORKDIR /app
ENTRYPOINT ["resnet-jax"]
CMD ["--help"]

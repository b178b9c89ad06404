# docker build -t milepost .                              PyTorch for CPUs
# docker build -t milepost:cuda --build-arg DEVICE=cuda .  PyTorch for CUDA, for `docker run --gpus all`
FROM python:3.13-slim

ARG DEVICE=cpu
WORKDIR /milepost
COPY requirements.txt .
RUN case "$DEVICE" in \
      cpu) index="--extra-index-url https://download.pytorch.org/whl/cpu" ;; \
      cuda) index="" ;; \
      *) echo "DEVICE=$DEVICE: expected cpu or cuda" >&2; exit 1 ;; \
    esac \
    && pip install --no-cache-dir $index -r requirements.txt
COPY . .

# The checkout stays read-only for the user that trains: all output goes to the volume.
RUN useradd --create-home --uid 1000 milepost && mkdir /data && chown milepost /data
USER milepost
VOLUME /data
ENV CHECKPOINT_DIR=/data/checkpoints RUNS_DIR=/data/runs XDG_CACHE_HOME=/data/cache PYTHONDONTWRITEBYTECODE=1
# SIGTERM of `docker stop` reaches Python itself, which saves before it ends.
ENTRYPOINT ["python"]
CMD ["training.py"]

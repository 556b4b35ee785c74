# Overnight in a container: the trainer as its entry point, on any GPU that `docker run --gpus all` hands over.
#
#   docker build -t overnight .
#   docker run --gpus all --shm-size 1g --user $(id -u):$(id -g) -e HF_TOKEN \
#     -v "$PWD/data:/overnight/data" -v "$PWD/runs:/overnight/runs" -v overnight-cache:/cache \
#     overnight recipes/fineweb_edu_40m.yaml
#
# Make the folders `data` and `runs` first: Docker would make them as root. Without a recipe the trainer picks one.
# Other commands take the entry point's place:
#
#   docker run ... --entrypoint python overnight recipes/prepare.py recipes/fineweb_edu_40m.yaml
#   docker run ... --entrypoint python overnight -m overnight.pipeline recipes/fineweb_edu_40m.yaml
#   docker run ... --entrypoint accelerate overnight launch --multi_gpu recipes/train.py recipes/fineweb_edu_40m.yaml
#
# `docker stop -t 60 CONTAINER` lets the trainer finish its iteration and save; the same `docker run` continues the run.

FROM python:3.11-slim

# gcc and the C headers are for torch.compile (Python.h comes with the image); PyTorch's wheels bring CUDA themselves.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev tini \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /overnight

# The dependencies come before the source, so that an edit does not download them again.
COPY pyproject.toml constraints.txt LICENSE ./
COPY src/overnight/__init__.py src/overnight/
RUN pip install --no-cache-dir --constraint constraints.txt --editable ".[gpu,prepare,eval]"
COPY accelerate_config.yaml ./
COPY src src
COPY recipes recipes

# Whatever --user says can write the data, the runs and the caches. Such a user has no entry in /etc/passwd, hence the
# names; PYTHONUNBUFFERED makes `docker logs` show each line at once.
RUN mkdir -p data runs /cache && chmod 1777 data runs /cache
ENV HOME=/cache \
    USER=overnight \
    LOGNAME=overnight \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    TRITON_CACHE_DIR=/cache/triton \
    PYTHONUNBUFFERED=1
VOLUME /cache
USER 1000:1000

# The trainer is started directly, not through accelerate's launcher, which would die of SIGTERM and leave it running.
# tini is process 1: it passes every signal on and reaps orphans, and the trainer's signals keep their default actions,
# which the kernel withholds from a process 1.
ENTRYPOINT ["tini", "--", "python", "recipes/train.py"]

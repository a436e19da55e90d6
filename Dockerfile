# The GPU environment in a container: CUDA toolkit, cuDNN and compiler from the base image, the pinned stack in .venv.
#   docker build -t rto .                                   on a machine with or without GPUs
#   docker build -t rto --build-arg KERNELS=no .            without TransformerEngine, which no stage needs
#   docker run --gpus all --ipc=host --rm -it -v "$PWD/runs:/home/rto/rto-megatron/runs" rto
FROM pytorch/pytorch:2.13.0-cuda13.2-cudnn9-devel

RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ git python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 rto
USER rto
WORKDIR /home/rto/rto-megatron
ENV CUDA_HOME=/usr/local/cuda HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# The environment first: a change of the code leaves its layer as it is.
COPY --chown=rto requirements.txt pyproject.toml ./
COPY --chown=rto requirements ./requirements
COPY --chown=rto launchers/setup.sh launchers/install_gpu.sh ./launchers/
COPY --chown=rto rto_megatron ./rto_megatron
ARG KERNELS=yes
RUN if [ "$KERNELS" = yes ]; then bash launchers/install_gpu.sh --for-image; else RTO_VARIANT=gpu bash launchers/setup.sh; fi

COPY --chown=rto . .
ENV PATH=/home/rto/rto-megatron/.venv/bin:$PATH
CMD ["bash", "launchers/acceptance.sh"]

# megatron_scalebio on NVIDIA's PyTorch image, which brings CUDA, NCCL, PyTorch and Transformer Engine.
#
#   docker build -t megatron-scalebio .
#   docker run --gpus all --ipc=host -v "$PWD:/work" megatron-scalebio reweight --config run.yaml
#
# On a cluster with enroot and pyxis: launch/enroot.sh.
ARG BASE=nvcr.io/nvidia/pytorch:25.10-py3
FROM ${BASE}

COPY . /opt/megatron-scalebio
RUN /opt/megatron-scalebio/tools/install.sh

WORKDIR /work
ENTRYPOINT ["megatron-scalebio"]

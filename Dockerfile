# PyTorch with CUDA, by NVIDIA, pinned.
FROM nvcr.io/nvidia/pytorch:25.01-py3

ENV PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    PIP_NO_CACHE_DIR=1

# The image brings torch, NumPy and most of the rest; these may be missing, or newer than its pins (PIP_CONSTRAINT).
RUN PIP_CONSTRAINT= pip install "click>=8.1" "filelock>=4.0" "huggingface_hub>=0.25" "Pillow>=10.1" "psutil>=5.9" "requests>=2.31" \
        "safetensors>=0.4.3" "tensorboard>=2.15" "tqdm>=4.65" "urllib3>=2.0.2" "matplotlib>=3.8" "diffusers>=0.32" \
        "transformers>=4.49" "pyspng>=0.1.2" \
    && useradd --create-home --uid 1001 researcher
USER 1001
WORKDIR /workspace
COPY --chown=1001 . /workspace

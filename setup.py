from pathlib import Path

from setuptools import find_packages, setup

TRAIN = ["deepspeed>=0.19,<0.20", "psutil", "rich", "tensorboard", "matplotlib"]
OPENCLIP = ["open_clip_torch>=3.3"]

setup(
    name="sycoca",
    version="0.1.0",
    description="SyCoCa with Triton kernels under DeepSpeed ZeRO",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["kernels", "kernels.*", "sycoca", "sycoca.*"]),
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "pillow>=10",
        "pydantic>=2.7",
        "safetensors>=0.4",
        "tokenizers>=0.20",
        'triton>=3.6; platform_system == "Linux"',
    ],
    extras_require={
        "train": TRAIN,
        "gpu": ["xformers>=0.0.35"],
        "openclip": OPENCLIP,
        "coco": ["pycocoevalcap>=1.2"],
        "peers": ["inf-cl>=1.2", "memeff>=0.3.1", "siglip-kernel>=0.1.2", "liger-kernel>=0.8", *OPENCLIP],
        "dev": [*TRAIN, "pytest>=8", "pytest-benchmark>=5", "ruff>=0.9"],
    },
)

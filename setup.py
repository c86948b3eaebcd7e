from pathlib import Path

from setuptools import find_packages, setup

PICTURES = ["matplotlib"]
PARQUET = ["pyarrow>=15"]
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.27"]
TRAIN = ["deepspeed>=0.19,<0.20", "psutil", "rich", "tensorboard", *PICTURES]
OPENCLIP = ["open_clip_torch>=3.3"]
# Parameters of its modules are renamed from time to time, and saved models hold these names.
TRANSFORMERS = ["transformers>=5.23,<6"]

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
        "huggingface_hub>=0.30",
        "numpy>=1.26",
        "pillow>=10",
        "pydantic>=2.7",
        "safetensors>=0.4",
        "tokenizers>=0.20",
        "tqdm>=4.60",
        'triton>=3.6; platform_system == "Linux"',
    ],
    entry_points={"console_scripts": ["sycoca = sycoca.__main__:entry"]},
    extras_require={
        "train": TRAIN,
        "pictures": PICTURES,
        "parquet": PARQUET,
        "docs": DOCS,
        "gpu": ["xformers>=0.0.35"],
        "openclip": OPENCLIP,
        "transformers": TRANSFORMERS,
        "coco": ["pycocoevalcap>=1.2"],
        "peers": ["inf-cl>=1.2", "memeff>=0.3.1", "siglip-kernel>=0.1.2", "liger-kernel>=0.8", *OPENCLIP],
        "wandb": ["wandb>=0.19"],
        "dev": [
            *TRAIN,
            *PARQUET,
            *DOCS,
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-xdist>=3.5",
            "ruff>=0.9",
            "webdataset>=1.0",
        ],
    },
)

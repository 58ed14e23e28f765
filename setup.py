"""Installs megatron_scalebio. requirements.txt pins what the Makefile installs and CI tests."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megatron-scalebio",
    version="0.1.0",
    description="ScaleBiO on Megatron-Core: learn data mixtures by bilevel optimization",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["megatron_scalebio", "megatron_scalebio.*"]),
    package_data={
        "megatron_scalebio": ["report/*.j2", "report/*.css", "report/*.js", "evaluate/tasks/*.yaml"]
    },
    python_requires=">=3.12,<3.14",
    install_requires=[
        "torch>=2.6,<2.15",  # 2.6: torch.load is weights_only by default
        "megatron-core>=0.19.2,<0.20",  # the engine
        "psutil>=5.9,<8",  # megatron-core's checkpoint writer needs it and does not declare it
        "numpy>=1.26,<3",
        "transformers>=5,<6",  # tokenizers, chat templates, config.json of Hugging Face models
        "safetensors>=0.5,<1",
        "tokenizers>=0.21,<0.24",
        "regex>=2024",  # words in any script; transformers needs it too
        "sentencepiece>=0.2,<0.3",
        "tensorboard>=2.16,<3",
        "rich>=13.7,<16",  # progress bars and tables
        "matplotlib>=3.10,<4",  # the charts of the report, the picture of a comparison
        "jinja2>=3.1,<4",  # the report page
        "PyYAML>=6,<7",
        "pyarrow>=17,<27",  # Parquet, Arrow and zstd inputs of prepare
    ],
    extras_require={
        "evaluate": ["lm-eval>=0.4.13,<0.5", "accelerate>=0.26,<2"],  # GSM8K and MATH
        "gguf": ["gguf>=0.17,<1"],  # to import GGUF files
        "dev": [
            "pytest>=8,<10",
            "pytest-timeout>=2.3,<3",
            "pytest-xdist>=3.6,<4",
            "hypothesis>=6.100,<7",
            "mutmut>=3.8,<3.9",  # its operators, in tools/mutants.py
            "libcst>=1.9,<2",
            "ruff>=0.9,<0.18",
            "mypy>=1.14,<3",
            "types-PyYAML",
            "pre-commit>=4,<5",
        ],
        "te": ["transformer-engine[core_cu13,pytorch]>=2.20,<2.21"],
    },
    entry_points={"console_scripts": ["megatron-scalebio=megatron_scalebio.cli:main"]},
)

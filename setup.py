"""Packages and dependencies of glm-jax; tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="glm-jax",
    version="0.1.0",
    description="GLM-4.5-class mixture-of-experts models in JAX, from raw documents to a trained model",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["glm_jax*", "pallas_kernels*", "experiments*"]),
    package_data={"": ["py.typed", "*.jinja", "*.html", "*.npz", "tuned/*.json", "*.textproto", "corpus/*.txt"]},
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12",
        "optax>=0.2.8",
        "grain>=0.2.18",
        "array_record>=0.8",
        "absl-py>=2.0",  # grain's worker processes read its flags
        "orbax-checkpoint>=0.12",
        "tokenizers>=0.23",
        "jaxtyping>=0.3",
        "tyro>=1.0",
        "tqdm>=4.66",
        "psutil>=6.0",
        "tensorboardX>=2.6",
        "matplotlib>=3.9",
        "jinja2>=3.1.6",  # earlier sandboxes leak, and a checkpoint's chat template is run in it
        "numpy>=2.0",
        "scipy>=1.13",
        "ml_dtypes>=0.5",
        "tensorstore>=0.1.80",
        "reasoning-gym>=0.1.25",
    ],
    extras_require={
        "gpu": ["jax[cuda13]>=0.10.2"],
        "tpu": ["jax[tpu]>=0.10.2"],
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.8",
            "pyright[nodejs]>=1.1.400",  # brings its own node: no other install, nothing fetched when it runs
            "import-linter>=2.6",
            "pre-commit>=4.0",
            "jupytext>=1.16",
            "nbclient>=0.10",
            "ipykernel>=6.29",
            "resiliparse>=2.0",
        ],
        "data": ["resiliparse>=2.0", "pyarrow>=18"],  # web pages and Parquet among data.paths; pages of a corpus
        "ray": ["ray>=2.40"],  # another engine for data's stages
        "oracle": [  # what parity tests and bench_hf compare with
            "torch>=2.13",
            "transformers>=5.23,<6",
            "renderers>=0.1.12",
            "httpx>=0.27",  # which renderers imports and does not declare
        ],
        "peers": [  # what bench_data compares with
            "trafilatura>=2.3",
            "lxml_html_clean>=0.4",  # which its justext imports and does not declare
            "datasketch>=2.0",
            "datatrove[io]>=0.10",
            "xxhash<4",  # which it hashes strings with: 4 takes bytes alone
            "spacy>=3.8",  # datatrove's words
        ],
    },
)

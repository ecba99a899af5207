"""Package metadata. Tool settings are in pyproject.toml; a comment says why a bound stands."""

import pathlib
import re
import shutil

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = pathlib.Path(__file__).parent
VERSION = re.search(
    r'__version__ = "([^"]+)"', (HERE / "spt_ds" / "__init__.py").read_text(encoding="utf-8")
).group(1)

# Both ends of each range are run: `make test-versions` runs the oldest and the newest of everything
# here but torch, and docs/reference/versions.md tells which torch releases and Pythons were run.
INSTALL = [
    # 2.10 is the first whose `torch.load(weights_only=True)` is without CVE-2026-24747.
    "torch>=2.10,<2.16",
    # The engine hooks (frozen base under ZeRO-3, offload) are measured on 0.19.8; minor releases
    # move them. DeepSpeed itself requires ninja, with which it builds its host ops at first use.
    "deepspeed>=0.19.8,<0.20",
    # v5 names: `dtype`, the attention interface, position ids in OPT. Minor releases rename
    # arguments of forward and generate, so each is run before it is admitted.
    "transformers>=5.17,<5.25",
    # 0.50 has CPU ops for 4-bit and 8-bit weights.
    "bitsandbytes>=0.50,<0.51",
    # transformers reads the ZeRO-3 configuration through it when it shards a base at load.
    "accelerate>=1.1,<2",
    # Finds files that were fetched before; the oldest that transformers 5.17 takes.
    "huggingface_hub>=1.5,<3",
    # `hub:` sources of data alone.
    "datasets>=4,<6",
    # The table of examples; 21 is the oldest that every admitted release of datasets reads with.
    "pyarrow>=21",
    "pyyaml>=6.0.2",
    # Chat templates. The sandbox of older releases lets a template out (CVE-2025-27516).
    "jinja2>=3.1.6",
    "pydantic>=2.8,<3",
    "safetensors>=0.8",
    # pyarrow imports no older one.
    "numpy>=2",
    # Sentence BLEU of context pairs in the contrastive loss, corpus BLEU in the scores.
    "sacrebleu>=2.4,<3",
    "tqdm>=4.66.3",
]
EXTRAS = {
    "flash": ["flash-attn>=2.7"],  # compiles for many minutes: never a default
    "flash4": ["flash-attn-4>=4.0.0b9"],  # Hopper and later cards
    "evaluate": ["rouge-score>=0.1.2"],
    "report": ["matplotlib>=3.9"],
    # BM25 for `data.overflow: retrieve`; the first whose functions take lists of words.
    "retrieve": ["bm25s>=0.2"],
    "baselines": ["peft>=0.19,<0.22"],
    # The oldest that the server's tests were run with; older h11 lets requests be smuggled
    # (CVE-2025-43859).
    "serve": [
        "h11>=0.16",
        "fastapi>=0.115.6",
        "uvicorn>=0.34",
        "prometheus-client>=0.21.1",
        "httpx>=0.28",
    ],
    # Older ones use names that NumPy 2 dropped; 2.16.0 also asks for a nightly TensorFlow.
    "tensorboard": ["tensorboard>=2.18"],
    # Services of others. None is in `dev`: together they bring 80 packages, some of them servers,
    # and the tests stand in for them. docs/how-to/track.md says which releases were run.
    "wandb": ["wandb>=0.20"],
    "mlflow": ["mlflow>=3.14"],
    "trackio": ["trackio>=0.43"],
    # Older ones put a blank behind the folders that they complete.
    "completion": ["shtab>=1.11"],
    # `make docs`, with docs/site/constraints.txt; Python 3.11 as myst-parser 5 asks.
    "docs": ["sphinx>=8.2", "myst-parser>=5", "furo>=2024.8.6"],
}
EXTRAS["dev"] = [
    *EXTRAS["evaluate"],
    *EXTRAS["report"],
    *EXTRAS["baselines"],
    *EXTRAS["retrieve"],
    *EXTRAS["tensorboard"],
    *EXTRAS["serve"],
    *EXTRAS["completion"],
    "packaging>=24",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "build>=1.2",
    "hypothesis>=6.100",
    "scipy>=1.13",  # the oracle of intervals and p-values
    "ruff>=0.9",
    "mypy>=1.11",
    "types-PyYAML",
    "uv>=0.9",  # makes the lock; installs what `make test-versions` runs
]


class BuildWithFolders(build_py):
    """Puts ds_configs/ and slurm/ into the wheel: see spt_ds/shipped.py."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # found in the checkout
        for name in ("ds_configs", "slurm"):
            # A site's own settings are no part of the package.
            shutil.copytree(
                HERE / name,
                pathlib.Path(self.build_lib) / "spt_ds" / "_shipped" / name,
                ignore=shutil.ignore_patterns("site.env"),
                dirs_exist_ok=True,
            )


setup(
    name="spt-ds",
    version=VERSION,
    description=(
        "Distributed training toolkit for Selective Prompt Tuning of frozen language models"
    ),
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",  # the range that torch and DeepSpeed both publish for
    packages=find_packages(include=["spt_ds", "spt_ds.*"]),
    package_data={
        "spt_ds": [
            "recipes/*/*.yaml",
            "assets/**/*",
            "report/style.css",
            "serve/page/*",
            "py.typed",
        ]
    },
    install_requires=INSTALL,
    extras_require=EXTRAS,
    cmdclass={"build_py": BuildWithFolders},
    entry_points={"console_scripts": ["spt-ds = spt_ds.cli:main"]},
)

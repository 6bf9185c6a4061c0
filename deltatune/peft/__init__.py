"""HF PEFT's adapters, in and out: one row per method, and a word on every field of its configurations.

    adapter = dt.load(model, folder)                    a folder that HF PEFT wrote
    adapter.save(folder, format="peft")                 a folder that HF PEFT reads
    adapter = dt.attach(model, peft.LoraConfig(...))    its configuration object, its rules for names included

Its files are read as data and its package is never imported for them. `FIELDS` says what each field means here; a field
that has no word, or whose value cannot be kept, is an error, never ignored. `docs/peft.md` is made from it.

Arrows inside, one way: {names, pieces} → beside → {weights, soft} → {plan, deltas} → {read, write}; `fields` is the
table that `plan` reads.
"""

from .fields import FIELDS as FIELDS
from .read import attach as attach
from .read import load as load
from .write import save as save

"""Sources -> a prepared data set. The files, in the order in which `prepare` goes through them:

- `stages.py`: `prepare`, which runs all that follows and goes on where a stopped run was.
- `parts.py`: `prepare_part` and `finish`, the same over many machines; `joined_chunks.py` joins what the parts left.
- `workspace.py`: the directory of the data set: what may be written there, the locks, the plan, cleaning up.
- `sealed.py`: working files are written with a digest, and read again only while they still have it.
- `chunks.py`: the working files that hold the documents, first as text, then as tokens.
- `text_chunks.py`: the sources are read into chunks of text; duplicates and bad rows are taken out.
- `validation_split.py`: which documents are for training and which for validation.
- `token_chunks.py`: the text of each chunk is encoded.
- `shards.py`: the tokens go to the shards that training reads.
"""

from inl_core.corpus.preparation.parts import PartSummary, finish, prepare_part
from inl_core.corpus.preparation.stages import PrepareProgress, prepare
from inl_core.corpus.preparation.workspace import Part

__all__ = ["Part", "PartSummary", "PrepareProgress", "finish", "prepare", "prepare_part"]

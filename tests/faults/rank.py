"""The command line as one rank of torchrun, with faults: python -m tests.faults.rank ARGUMENTS.

INL_FAULTS is a JSON object that maps a rank's number to its faults.
"""

import json
import os

from inl_cli.app import main
from tests.faults.inject import Fault, Faults

if __name__ == "__main__":
    mine = json.loads(os.environ["INL_FAULTS"]).get(os.environ["RANK"], [])
    Faults([Fault(**fault) for fault in mine], None).install()
    main()

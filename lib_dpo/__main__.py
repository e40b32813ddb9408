"""`python -m lib_dpo`."""

from __future__ import annotations

import sys

from lib_dpo.cli import main

sys.exit(main())

"""`python -m verl_sspo COMMAND` is `verl-sspo COMMAND`."""

import sys

from verl_sspo.cli import main

sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""``python -m deepspeed`` is the ``deepspeed`` command."""

from deepspeed.launcher.runner import main

if __name__ == "__main__":
    main()

import sys

from megatron_scalebio.cli import main

if __name__ == "__main__":
    sys.exit(main())

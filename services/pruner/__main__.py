"""`python -m services.pruner`."""

from hiprune.server import main
from services.pruner.process import PrunerService
from services.pruner.settings import Settings

if __name__ == "__main__":
    main(Settings, PrunerService)

"""`python -m services.encoder`."""

from hiprune.server import main
from services.encoder.process import EncoderService
from services.encoder.settings import Settings

if __name__ == "__main__":
    main(Settings, EncoderService)

"""`python3 -m milepost.config` writes .env.example and docs/configuration.md from the declarations."""

from milepost.config.docs import write_files

write_files()

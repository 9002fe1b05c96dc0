"""Imported last by the server that forks scripts: the processor time that their imports took."""

import time

IMPORT_SECONDS = time.process_time()

"""Runs cells in a real Jupyter kernel: `python notebook_program.py FILE CELL...`.

Runs where Jupyter is installed. Keeps the notebook with all outputs as FILE, and prints how often
an output that was there already was replaced by another one.
"""

import sys

import nbclient
import nbformat

FILE, *CELLS = sys.argv[1:]


class Client(nbclient.NotebookClient):
    updates = 0

    def process_message(self, msg, cell, cell_index):
        self.updates += msg["msg_type"] == "update_display_data"
        return super().process_message(msg, cell, cell_index)


notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
client = Client(notebook, timeout=400, kernel_name="python3", allow_errors=True)
client.execute()
nbformat.write(notebook, FILE)
print(client.updates)

"""What the commands do, as functions of plain values: the command line and the web only call them."""

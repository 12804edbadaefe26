@python "%~dp0deepspeed.pt" %*

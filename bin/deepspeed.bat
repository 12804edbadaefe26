@python "%~dp0deepspeed" %*

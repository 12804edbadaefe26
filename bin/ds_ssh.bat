@python "%~dp0ds_ssh" %*

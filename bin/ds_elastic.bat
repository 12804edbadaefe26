@python "%~dp0ds_elastic" %*

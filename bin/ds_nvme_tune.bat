@python "%~dp0ds_nvme_tune" %*

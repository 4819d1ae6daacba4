#pragma once
using cublasHandle_t = struct cublasContext*;
using cublasStatus_t = int;

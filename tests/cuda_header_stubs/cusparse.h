#pragma once
using cusparseHandle_t = struct cusparseContext*;
using cusparseStatus_t = int;

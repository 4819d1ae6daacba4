#pragma once
using cusolverStatus_t = int;

#include "runtime/acl/task.h"

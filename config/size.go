package config

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// Size is a number of bytes.
type Size int64

// units in the order in which String tries them.
var units = []struct {
	name  string
	bytes int64
}{
	{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10},
	{"TB", 1e12}, {"GB", 1e9}, {"MB", 1e6}, {"KB", 1e3},
	{"T", 1e12}, {"G", 1e9}, {"M", 1e6}, {"K", 1e3}, {"B", 1},
}

// ParseSize reads a whole number with a unit: KiB, MiB, GiB, TiB count in 1024, K, M, G, T (or KB, MB, GB, TB) in 1000, and
// no unit (or B) is bytes. The error says what is wrong, and doesn't repeat the text.
func ParseSize(text string) (Size, error) {
	digits := strings.TrimRight(text, "BKMGTi")
	number, err := strconv.ParseUint(digits, 10, 63)
	if err != nil {
		if err, ok := err.(*strconv.NumError); ok && err.Err == strconv.ErrRange {
			return 0, fmt.Errorf("more bytes than can be counted")
		}
		return 0, fmt.Errorf("not a whole number with a unit")
	}
	unit := text[len(digits):]
	if unit == "" {
		return Size(number), nil
	}
	for _, u := range units {
		if u.name != unit {
			continue
		}
		if number > math.MaxInt64/uint64(u.bytes) {
			return 0, fmt.Errorf("more bytes than can be counted")
		}
		return Size(int64(number) * u.bytes), nil
	}
	return 0, fmt.Errorf("the unit %q is unknown", unit)
}

// String gives the size with the largest unit that it is a whole number of, so that ParseSize reads the same back.
func (s Size) String() string {
	if s > 0 {
		for _, u := range units {
			if int64(s)%u.bytes == 0 && u.bytes > 1 {
				return strconv.FormatInt(int64(s)/u.bytes, 10) + u.name
			}
		}
	}
	return strconv.FormatInt(int64(s), 10)
}

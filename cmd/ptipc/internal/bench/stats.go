package bench

import (
	"math"
	"slices"
	"time"
)

// Median is the middle of the values, the mean of the middle two if their number
// is even, and NaN of none.
func Median(values []float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	s := slices.Sorted(slices.Values(values))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// percentile is the smallest of the values that p percent of them do not exceed.
// values must be sorted and not empty.
func percentile(values []time.Duration, p int) time.Duration {
	return values[max(1, (len(values)*p+99)/100)-1]
}

// Ratio is the median of a/b over the rounds, and NaN if there is no such thing.
func Ratio(a, b []float64) float64 {
	var ratios []float64
	for i := range min(len(a), len(b)) {
		if b[i] != 0 {
			ratios = append(ratios, a[i]/b[i])
		}
	}
	return Median(ratios)
}

package main

import (
	"maps"
	"os"
	"path/filepath"
	"testing"
)

func TestSpreadOf(t *testing.T) {
	for _, c := range []struct {
		sample []float64
		want   spread
	}{
		{nil, spread{}},
		{[]float64{7}, spread{7, 7, 7, 7, 7}},
		{[]float64{4, 1, 3, 2}, spread{1, 1.75, 2.5, 3.25, 4}},
		{[]float64{50, 10, 20, 40, 30}, spread{10, 20, 30, 40, 50}},
	} {
		if got := spreadOf(c.sample); got != c.want {
			t.Errorf("spread of %v is %v, want %v", c.sample, got, c.want)
		}
	}
}

func TestReadBenchmark(t *testing.T) {
	file := filepath.Join(t.TempDir(), "output")
	text := "goos: linux\n" +
		"BenchmarkOther-2   \t       1\t         9.000 clawvm-cached-ms\n" +
		"BenchmarkBesideUnbound-2   \t       1\t         2.041 clawvm-cached-ms\t     44560 clawvm-cached-queries/s\t         0 ns/op\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := readBenchmark(file, "BenchmarkBesideUnbound")
	want := map[string]float64{"clawvm-cached-ms": 2.041, "clawvm-cached-queries/s": 44560, "ns/op": 0}
	if err != nil || !maps.Equal(got, want) {
		t.Errorf("got %v, %v; want %v", got, err, want)
	}
	if got, err := readBenchmark(file, "BenchmarkBeside"); err == nil {
		t.Errorf("a benchmark that wasn't run has the results %v", got)
	}
}
